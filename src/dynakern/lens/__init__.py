"""What kernel does this module apply? Measures for any torch module and input."""

from dynakern.lens.dynamism import dynamism, effective_kernel, impulse_response
from dynakern.lens.look import Look, look
from dynakern.lens.receptive_field import ReceptiveField, effective_receptive_field
from dynakern.lens.tangent_kernel import TangentSpectrum, tangent_spectrum

__all__ = [
    "Look",
    "ReceptiveField",
    "TangentSpectrum",
    "dynamism",
    "effective_kernel",
    "effective_receptive_field",
    "impulse_response",
    "look",
    "tangent_spectrum",
]
