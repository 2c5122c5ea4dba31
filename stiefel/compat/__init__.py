"""Private names of torch and classes of geoopt, which may change without notice, behind functions of this library."""
