"""What a run is, and what it leaves behind: its spec, its folder, its record. No torch."""
