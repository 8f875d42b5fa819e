"""Running plans on torch.distributed: groups, exchange, attention, the Hugging Face hook, FSDP2, the step.

Importing this registers `attn_implementation="flexsp"` with transformers.
"""

from transformers import AttentionInterface

from flexsp.parallel.agreement import PlanMismatchError, RankError
from flexsp.parallel.attention import NAME, SPContext, flexsp_attention
from flexsp.parallel.check import check_model
from flexsp.parallel.export import save_pretrained
from flexsp.parallel.groups import GroupPool
from flexsp.parallel.layouts import check_degrees, default_layouts, layouts_of, powers_of_two
from flexsp.parallel.model import make_mesh, prepare_model
from flexsp.parallel.step import StepResult, forward_backward, forward_only

AttentionInterface.register(NAME, flexsp_attention)

__all__ = [
    "GroupPool",
    "PlanMismatchError",
    "RankError",
    "SPContext",
    "StepResult",
    "check_degrees",
    "check_model",
    "default_layouts",
    "flexsp_attention",
    "forward_backward",
    "forward_only",
    "layouts_of",
    "make_mesh",
    "powers_of_two",
    "prepare_model",
    "save_pretrained",
]
