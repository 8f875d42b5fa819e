"""The words of docs/paper.md; what stands in braces is filled in by `paper_page`, from results and claims alone."""

INTRO = """\
# The paper, reproduced

{quick}What *FlexSP* (arXiv 2412.01523, ASPLOS'25) reports, beside what flexsp's simulator predicts under the
profiles that were published with it: GPT-7B, 13B and 30B on 64 A100-40GB. The paper measured on GPUs;
**all figures of ours are predictions of its cost model**, on {lengths_said}. `make paper` wrote this
page{command} on {date}, in {minutes:.0f} minutes on {machine} (Python {python}, OR-Tools {ortools}); all
figures and settings are in `{stored}`.

In short: `flex` is predicted to be {over_static} times as fast as one static degree (the paper: up to
{paper_static}) and {over_adaptive} times as fast as the best degree of each batch (up to {paper_adaptive}).
In every cell its plans are at most {gap} above the lower bound of all plans under this profile.
[Why we differ](#where-we-differ-and-why) is told below.

Our baselines are `static`, the least degree that holds the context limit, and `batch-adaptive`, the best one
degree of each batch. `milp`, the paper's own planner written anew, needs minutes of a core for a batch and is
in the ablation alone. "Over" is the ratio of the seconds of all steps, since the paper compares means; seconds
of a step are medians. K is 1024 tokens. One cell alone, with its timelines and pictures:

```
flexsp simulate {example} --profile examples/profiles/gpt-7b-64xa100-384k.json \\
    --max-length 384K --overlong drop --output DIR
```

## Lengths

{lengths}

{sources}

Sequences above the context limit are left out, as in the paper. A global batch has {batch_size} sequences and
a cell {iterations} batches (the paper: {paper_batch} and {paper_iterations}), the same ones for all planners.
"""

SPEEDUPS = """\
## Speedups (the paper's Fig. 4)

![Seconds of a step in every cell](figures/paper_speedups.png)

{extremes}

By corpus the paper has only the larger of its speedups over DeepSpeed and over Megatron-LM. The published
baselines are those of its solver, rebuilt rule by rule: static has degree {published_degree} at
every limit, and best fit fills a group to {fill} of its memory. Ours take the least degree that holds the limit
and spread sequences over all groups that a micro-batch has anyway, so the published static takes {static_ratio}
times as long as ours and the published batch-adaptive {adaptive_ratio} times.

{cells}

Exchange is the all-to-all's share of the device-seconds under static / batch-adaptive / flex. {by_corpus}
"""

CASES = """\
## Layouts (Table 3, Fig. 5)

The paper's two cases are iterations of GPT-7B on CommonCrawl at 384K, whose batches are not published. Ours
are the batches of the {context_k}K cells of GPT-7B that are most like them: static takes as many micro-batches,
or nearly, and the same single degree is best, or nearly. `<8x7, 4x2>` is a micro-batch of seven groups of 8 and
two of 4.

{layouts}

In the paper all-to-all takes up to {static_exchange} under DeepSpeed, {adaptive_exchange} under batch-adaptive in
Case 1 and about {mixed_exchange} under FlexSP; there is up to {reduction} times less of it, and a step is up to
{case_speedup} times as fast. Ours: {cases_said}. `flex` uses degrees 1, 2 and 4 where the paper's layouts have 8:
exchange inside a node is cheap, but a group of one has none, and by the formula it costs nothing to halve a group
that has time to spare.

{assigned}

The paper's row is the numbers in its Fig. 5b, which add up to the batch; that they belong to the degrees in this
order is our reading.

![Lengths by degree](figures/paper_assigned.png)
"""

SCALING = """\
## Scaling (Fig. 6)

GPT-7B on {corpus}. Figures of the planners are tokens per second and device.

![Tokens per second and device](figures/paper_scaling.png)

By number of devices, up to {context_k}K tokens:

{devices}

The paper has at most {paper_devices} over DeepSpeed on 16, 32 and 64 GPUs; ours is {ours_devices} there. It
reports {from_16} times the throughput on 32 GPUs as on 16 and {from_32} times on 64 as on 32 (DeepSpeed:
{static_from_16} times from 16 to 32); ours is {grown}. {adaptive}

By context limit, on 64 devices:

{contexts}

The paper has {paper_contexts} over DeepSpeed from 64K to 384K; ours is {ours_contexts}. {shape}

What was assumed: `Profile.for_devices` makes the profile of another number of devices, and writes into it
"{assumptions}". So a larger cluster has neither slower parameter gathers nor other links, which flatters large
clusters, under all planners alike. From 64 devices on, a batch has {per_device} sequences for each device. On 16
devices GPT-7B is planned with {bytes_16} MB of activations a token, as by the published solver, and with unchanged
seconds. At limits other than 192K and 384K the model states follow the line through these two, by the learned
positions, as in the published solver.

{misfits}
"""

ABLATION = """\
## Ablation of sorting and bucketing (Fig. 7)

`milp` with parts taken away: GPT-7B on {corpus}, the first {batches} batches of each limit, **{limit:g} s for all
MILPs of a batch**, on one core, by CP-SAT (the paper: SCIP). Few MILPs are proven in that time, as the last
column says.

![Ablation](figures/paper_ablation.png)

{ablation}

Times are geometric means over the batches that both planned. Without sorting it takes {unsorted} times as long,
with buckets of equal width {naive} times (both worse in the paper too), and without buckets {none} times. There the
paper's solver finds no satisfactory plan in its time. Ours cannot show that: its MILPs begin with groups that `flex`
makes of each micro-batch, which are good already, and better without the error of buckets. {cold}
"""

BUCKETING = """\
## The error of bucketing (Table 4)

Tokens that {num_buckets} buckets for each micro-batch add, over tokens: the largest of {iterations} batches, and
the mean in brackets. The published solver rounds lengths up to multiples of {rounded_to} first, which makes more of
them alike and the error smaller. Naive buckets are equally wide.

{bucketing}

{said} The paper does not say over which batches, limits and micro-batches its errors are the largest.
"""

ENDING = """\
## Where we differ, and why

{differences}

## What a cost model cannot show

- **Megatron-LM.** Tensor parallelism and ring attention have costs of their own, and no profile of them is
  published: the paper's {megatron} is not checked.
- **Kernels.** The seconds of a token do not depend on how many there are; on a GPU attention on many short sequences
  and small matrix products are less efficient, and it is small groups that have them.
- **Overlap and contention.** Exchange is neither hidden behind compute nor slowed by other groups on the same
  network card.
- **Parameter gathers** are `fixed_s`, whatever a micro-batch holds; where compute can hide them they cost less.
- **Planning** costs nothing here. `flex` took {solve} s a batch in the median of a cell, its bound included, and
  {slowest} s at most, on shared cores; the published solver takes {solver} s by its authors. Both plan ahead.
- **The rest of a system**: data, the optimizer, making groups, stragglers, fragmented memory. The paper gives its
  own cost estimate's error as below 6 %.

## Which figures of the paper these are

Found:

{found}

Not found, and so not compared:

{not_found}
"""
