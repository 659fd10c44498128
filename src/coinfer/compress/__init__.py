"""What changes a network: int8 quantisation, and training by one loop."""
