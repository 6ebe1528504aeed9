"""Others' DenseNets made efficient in place."""

from densenet_fast.conversion.convert import ConversionReport, ConversionRow, convert, revert

__all__ = ["ConversionReport", "ConversionRow", "convert", "revert"]
