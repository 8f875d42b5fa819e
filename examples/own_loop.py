"""Mixed sequence-parallel degrees in a training loop of your own.

    torchrun --nproc-per-node 4 examples/own_loop.py [FOLDER]

flexsp's are the loader, the wired model, the pool of groups, forward and backward, and the saved model. The rest is
plain torch. Started again, it goes on from the last checkpoint in FOLDER, on any number of ranks.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from flexsp.data import Overlong, PlannedLoader, apply_context_limit, open_corpus
from flexsp.parallel import GroupPool, forward_backward, prepare_model, save_pretrained
from flexsp.profiler import measure_profile

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_loop")
STEPS, EVERY = 5, 3


def save(model, optimizer, steps: int) -> None:
    """Writes a checkpoint of so many steps. A collective."""
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=FOLDER / str(steps))


def load(model, optimizer) -> int:
    """Takes up the last checkpoint, if there is one, and returns how many steps have been done. A collective."""
    whole = FOLDER.glob("*/.metadata")  # which is written last
    steps = max((int(path.parent.name) for path in whole), default=0)
    if steps:
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=FOLDER / str(steps))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return steps


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

    first_step = load(model, optimizer)  # the position in the data is the step: seed and step say which sequences

    with PlannedLoader(sequences, profile, groups.control, batch_size=16, steps=STEPS, first_step=first_step) as loader:
        for batch in loader:
            result = forward_backward(model, batch, groups)  # adds to .grad
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
            optimizer.step()
            optimizer.zero_grad()
            if dist.get_rank() == 0:
                print(f"step {batch.step}: loss {result.loss:.3f}, grad_norm {grad_norm:.2f}, plan {batch.plan}")
            if (batch.step + 1) % EVERY == 0:
                save(model, optimizer, batch.step + 1)
    save_pretrained(model, FOLDER / "model")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
