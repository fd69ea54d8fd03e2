"""What trains a network: objectives, optimizers, the step and the loop."""
