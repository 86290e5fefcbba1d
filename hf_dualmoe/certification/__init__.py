"""Certificates: proofs that no change of an image within a radius changes its class.

In: a model, images, labels. Out: radii, each with the theorem that proves it, or the reason why nothing is proved;
of a dataset a `CertificationReport`.

Calls: attacks, data, evaluation, models.
"""

from .certifier import Certificates, Certifier, certify
from .lipschitz import LipschitzBound, NotApplicableError, lipschitz_bound
from .report import CertificationReport, certify_dataset, plot_certificates
from .route_radii import route_radii
from .smoothing import smoothed_certificates, smoothed_radius
from .theorems import dual_radius, hard_gate_radius, margin_radius

__all__ = [
    "Certificates",
    "CertificationReport",
    "Certifier",
    "LipschitzBound",
    "NotApplicableError",
    "certify",
    "certify_dataset",
    "dual_radius",
    "hard_gate_radius",
    "lipschitz_bound",
    "margin_radius",
    "plot_certificates",
    "route_radii",
    "smoothed_certificates",
    "smoothed_radius",
]
