"""The student: new tokens and two projections on a frozen language model."""
