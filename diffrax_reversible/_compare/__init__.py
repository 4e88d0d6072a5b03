from .compare import compare_adjoints as compare_adjoints
from .figures import AdjointFigures as AdjointFigures, Comparison as Comparison
