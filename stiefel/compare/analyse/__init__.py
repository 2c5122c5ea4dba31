"""From records to numbers: rows, scores, summaries, recommendations. No torch."""
