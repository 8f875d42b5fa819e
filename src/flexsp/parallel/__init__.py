"""Running plans on torch.distributed: groups, exchange, attention, the Hugging Face hook, FSDP2, the step.

Importing this registers `attn_implementation="flexsp"` with transformers.
"""

from transformers import AttentionInterface

from flexsp.parallel.agreement import PlanMismatchError, RankError
from flexsp.parallel.attention import NAME, SPContext, flexsp_attention
from flexsp.parallel.groups import GroupPool
from flexsp.parallel.model import check_degrees, check_model, prepare_model, servable_degrees
from flexsp.parallel.step import StepResult, forward_backward

AttentionInterface.register(NAME, flexsp_attention)

__all__ = [
    "GroupPool",
    "PlanMismatchError",
    "RankError",
    "SPContext",
    "StepResult",
    "check_degrees",
    "check_model",
    "forward_backward",
    "prepare_model",
    "servable_degrees",
]
