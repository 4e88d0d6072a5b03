from .intervals import (
    knows_its_steps as knows_its_steps,
    Span as Span,
    Steps as Steps,
)
from .moving import (
    follow as follow,
    moving_node as moving_node,
    MovingSteps as MovingSteps,
)
from .recorded import (
    may_jump as may_jump,
    RecordedState as RecordedState,
    RecordedSteps as RecordedSteps,
    StepRecord as StepRecord,
)
from .replayed import ReplayedSteps as ReplayedSteps
