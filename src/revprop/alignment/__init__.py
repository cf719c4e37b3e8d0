"""Feature alignment: encoders that are their own decoders, and what they are compared with."""

from revprop.alignment.adversarial import CONTESTS, Contest, FeatureAlignedGAN
from revprop.alignment.baselines import GAN, VAE, AutoEncoder
from revprop.alignment.constraint import WEIGHT_BOUND, clamp_weights, orthogonal_weights
from revprop.alignment.encoder import AffineDecoder, FeatureAligned, half_squares
from revprop.alignment.frechet import frechet_distance, image_distance
from revprop.alignment.local import ARCSINH, LocalFeatureAligned
from revprop.alignment.paper_models import MODELS, Sizes, paper_model
from revprop.alignment.settings import AlignmentSettings
from revprop.alignment.trainable import Trainable
from revprop.alignment.variational import VariationalFeatureAligned, along, between, divergence

__all__ = [
    "ARCSINH",
    "CONTESTS",
    "GAN",
    "MODELS",
    "VAE",
    "WEIGHT_BOUND",
    "AffineDecoder",
    "AlignmentSettings",
    "AutoEncoder",
    "Contest",
    "FeatureAligned",
    "FeatureAlignedGAN",
    "LocalFeatureAligned",
    "Sizes",
    "Trainable",
    "VariationalFeatureAligned",
    "along",
    "between",
    "clamp_weights",
    "divergence",
    "frechet_distance",
    "half_squares",
    "image_distance",
    "orthogonal_weights",
    "paper_model",
]
