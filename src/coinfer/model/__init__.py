"""Networks: capture, legal cuts, exact splits, ONNX segments, and the zoo."""
