"""revprop runs trained PyTorch networks backwards: reconstruct, repair, explain, regularise, generate."""

from revprop.adjoint import Hypersurface, hypersurface
from revprop.alignment import (
    GAN,
    VAE,
    AlignmentSettings,
    AutoEncoder,
    FeatureAligned,
    FeatureAlignedGAN,
    LocalFeatureAligned,
    VariationalFeatureAligned,
    clamp_weights,
    orthogonal_weights,
)
from revprop.attribution import Contributions
from revprop.closed_form import ClosedForm
from revprop.completeness import completeness
from revprop.diagnosis import Diagnosis, diagnose
from revprop.embedding import embed_labels
from revprop.errors import ExportError, NonFiniteError, UnsupportedOperatorError
from revprop.folding import fold
from revprop.graph import Graph, trace
from revprop.information import InformationPlane, information_plane, mutual_information
from revprop.orthogonality import Orthogonality
from revprop.post_training import PostTraining, post_train
from revprop.racecar import Racecar
from revprop.reconstruction import Reconstruction, reconstruct
from revprop.reverse import check
from revprop.spectrum import Spectrum, spectrum
from revprop.stylisation import Stylisation, stylise
from revprop.tasks import Classification, MultiLabel, Regression
from revprop.training import Training, TrainingDivergedError, train_baseline

__version__ = "0.1.0"

__all__ = [
    "GAN",
    "VAE",
    "AlignmentSettings",
    "AutoEncoder",
    "Classification",
    "ClosedForm",
    "Contributions",
    "Diagnosis",
    "ExportError",
    "FeatureAligned",
    "FeatureAlignedGAN",
    "Graph",
    "Hypersurface",
    "InformationPlane",
    "LocalFeatureAligned",
    "MultiLabel",
    "NonFiniteError",
    "Orthogonality",
    "PostTraining",
    "Racecar",
    "Reconstruction",
    "Regression",
    "Spectrum",
    "Stylisation",
    "Training",
    "TrainingDivergedError",
    "UnsupportedOperatorError",
    "VariationalFeatureAligned",
    "check",
    "clamp_weights",
    "completeness",
    "diagnose",
    "embed_labels",
    "fold",
    "hypersurface",
    "information_plane",
    "mutual_information",
    "orthogonal_weights",
    "post_train",
    "reconstruct",
    "spectrum",
    "stylise",
    "trace",
    "train_baseline",
]
