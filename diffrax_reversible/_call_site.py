"""Where a user has called `diffeqsolve`, for errors and warnings that come up later."""

import linecache
import traceback
from types import FrameType
from typing import NamedTuple


# Their frames say nothing to a user.
_hidden = ("diffrax", "diffrax_reversible", "equinox", "jax", "jaxtyping", "beartype")
_shown = ("diffrax_reversible._examples",)


class CallSite(NamedTuple):
    """A line of a user's program. Printed as Python prints it in a traceback."""

    file: str
    line: int
    function: str

    def __str__(self):
        text = linecache.getline(self.file, self.line).strip()
        place = f'  File "{self.file}", line {self.line}, in {self.function}'
        return f"{place}\n    {text}" if text else place


def _is_hidden(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    if name.startswith(_shown):
        return False
    # A function whose types are checked is called by one that has no file.
    checked = frame.f_code.co_filename.startswith("<@beartype")
    return checked or name.partition(".")[0] in _hidden


def call_site() -> CallSite | None:
    """The innermost line on the stack that is not of this package nor of those below it;
    `None` if there is none. To be called while `diffeqsolve` is traced."""
    for frame, line in traceback.walk_stack(None):
        if not _is_hidden(frame):
            return CallSite(frame.f_code.co_filename, line, frame.f_code.co_name)
    return None
