"""What training steps cost: time, memory, energy, operations. Alone knows clocks and devices."""
