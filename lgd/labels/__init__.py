"""What is predicted: targets, answers to them, and how well these hold."""
