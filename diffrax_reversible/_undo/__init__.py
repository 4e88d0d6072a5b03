from .encoding import decode as decode, encode as encode, Encoding as Encoding
from .undo import undo as undo
