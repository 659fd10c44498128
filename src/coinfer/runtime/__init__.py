"""What runs a bundle: the device, the edge, and the link between them.  No torch."""
