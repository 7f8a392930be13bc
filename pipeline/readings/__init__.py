"""What can be read of a backbone without training it, and what a closed form to its answers adds."""
