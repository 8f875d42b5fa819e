"""Mixed sequence-parallel degrees in a training loop of your own.

    torchrun --nproc-per-node 4 examples/own_loop.py

flexsp's are the loader, the wired model, the pool of groups, and forward and backward. The rest is plain torch.
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from flexsp.data import Overlong, PlannedLoader, apply_context_limit, open_corpus
from flexsp.parallel import GroupPool, forward_backward, prepare_model
from flexsp.profiler import measure_profile

STEPS = 5


def main() -> None:
    dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)  # the same weights on every rank

    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = prepare_model(AutoModelForCausalLM.from_config(config))  # our attention, FSDP2 over all ranks
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    groups = GroupPool()

    sequences, touched = apply_context_limit(open_corpus("python-stdlib"), max_length=2048, overlong=Overlong.DROP)
    degrees = [d for d in (1, 2, 4) if d <= dist.get_world_size()]
    profile = measure_profile(model, groups, sp_degrees=degrees, max_tokens_per_rank=2048 // degrees[-1])
    if dist.get_rank() == 0:
        print(f"{touched.documents} documents of {touched.tokens:,} tokens are above the context limit and left out")

    with PlannedLoader(sequences, profile, groups.control, batch_size=16, steps=STEPS) as loader:
        for batch in loader:
            result = forward_backward(model, batch, groups)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            optimizer.step()
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                print(f"step {batch.step}: loss {result.loss:.3f}, grad_norm {grad_norm:.2f}, plan {batch.plan}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
