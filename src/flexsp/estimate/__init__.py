"""A profile of a model on a cluster from data sheets: no hardware, no torch."""

from flexsp.estimate.cluster import Cluster, cluster_names, load_cluster
from flexsp.estimate.model import estimate_profile
from flexsp.estimate.read_config import load_model_shape, model_shape
from flexsp.estimate.shape import ModelShape

__all__ = [
    "Cluster",
    "ModelShape",
    "cluster_names",
    "estimate_profile",
    "load_cluster",
    "load_model_shape",
    "model_shape",
]
