"""Tensors of which each process of a group holds a part."""

from curvature.sharding import algebra as algebra
from curvature.sharding import views as views
