from .intervals import (
    knows_its_steps as knows_its_steps,
    step_interval as step_interval,
)
from .recorded import (
    RecordedState as RecordedState,
    RecordedSteps as RecordedSteps,
    StepRecord as StepRecord,
)
from .replayed import ReplayedSteps as ReplayedSteps
