"""Where the figures of a run go beside its folder: TensorBoard, Weights & Biases, MLflow."""
