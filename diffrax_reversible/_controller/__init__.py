from .recorded import (
    RecordedState as RecordedState,
    RecordedSteps as RecordedSteps,
    StepRecord as StepRecord,
)
from .replayed import ReplayedSteps as ReplayedSteps
