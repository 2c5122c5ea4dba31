"""The one place that imports geoopt, without its warnings. Importing this module costs half a second: do it lazily."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # geoopt compiles helpers with torch.jit, which torch deprecates
    import geoopt

__all__ = ["geoopt"]
