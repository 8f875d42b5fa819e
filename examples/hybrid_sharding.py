"""Copies of a sharded model, bf16, degrees beyond the heads and an optimizer of your own.

    torchrun --nproc-per-node 4 examples/hybrid_sharding.py

On large clusters each group of nodes holds a whole copy of the model (replicate x shard), so that gathering parameters
stays inside it; sequence-parallel groups may still span copies, since gradients are summed over all ranks. The model
here has three heads: degrees 2 and 4 cannot trade heads alone and pass keys and values around a ring.
"""

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from flexsp.data import Overlong, PlannedLoader, apply_context_limit, open_corpus
from flexsp.parallel import GroupPool, forward_backward, make_mesh, prepare_model
from flexsp.profiler import measure_profile

STEPS = 5


class SignDescent(torch.optim.Optimizer):
    """Any torch optimizer will do: parameters and gradients are this rank's shards (DTensor)."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def main() -> None:
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)  # the same weights on every rank

    config = LlamaConfig(vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=1)  # fmt: skip
    world_size = dist.get_world_size()
    model = prepare_model(
        AutoModelForCausalLM.from_config(config),
        mesh=make_mesh(replicate=2 if world_size % 2 == 0 else 1),
        param_dtype=torch.bfloat16,  # what is computed in; weights and gradients stay in fp32
        reshard_after_forward=False,
    )
    optimizer = SignDescent(model.parameters(), lr=1e-3)
    groups = GroupPool()
    profile = measure_profile(
        model, groups, sp_degrees=[d for d in (1, 2, 4) if d <= world_size], param_dtype=torch.bfloat16,
        max_tokens_per_rank=2048 // world_size,
    )  # fmt: skip
    sequences, _ = apply_context_limit(open_corpus("python-stdlib"), max_length=2048, overlong=Overlong.DROP)
    if dist.get_rank() == 0:
        print("degrees run as", {d: f"{v.ulysses} x {v.ring}" for d, v in profile.layouts.items()})

    with PlannedLoader(sequences, profile, groups.control, batch_size=16, steps=STEPS) as loader:
        for batch in loader:
            result = forward_backward(model, batch, groups)
            optimizer.step()
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                print(f"step {batch.step}: loss {result.loss:.3f}, plan {batch.plan}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
