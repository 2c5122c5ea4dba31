"""Inside the process of one run: what it is given, and what it trains, measures and writes."""
