"""Other libraries' DenseNets made efficient in place."""

from densenet_fast.conversion.convert import convert, revert
from densenet_fast.conversion.report import ConversionReport, ConversionRow

__all__ = ["ConversionReport", "ConversionRow", "convert", "revert"]
