"""revprop runs trained PyTorch networks backwards: reconstruct, repair, explain, regularise, generate."""

from revprop.embedding import embed_labels
from revprop.errors import ExportError, NonFiniteError, UnsupportedOperatorError
from revprop.graph import Graph, trace
from revprop.reconstruction import Reconstruction, reconstruct
from revprop.reverse import check

__version__ = "0.1.0"

__all__ = ["ExportError", "Graph", "NonFiniteError", "Reconstruction", "UnsupportedOperatorError", "check", "embed_labels",
           "reconstruct", "trace"]
