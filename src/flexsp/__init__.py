"""flexsp: train LLMs on sequences of very different lengths with mixed sequence-parallel degrees.

Planning needs numpy alone; `flexsp.parallel`, `flexsp.data` and `flexsp.train` need torch: `pip install flexsp[train]`.
"""

from flexsp.legality import violations
from flexsp.planner import plan
from flexsp.plans import Group, MicroBatch, Plan, Status
from flexsp.profile import Profile

__version__ = "0.1.0"
__all__ = ["Group", "MicroBatch", "Plan", "Profile", "Status", "plan", "violations"]
