from .recorded import (
    may_jump as may_jump,
    RecordedState as RecordedState,
    RecordedSteps as RecordedSteps,
    StepRecord as StepRecord,
)
from .replayed import ReplayedSteps as ReplayedSteps
