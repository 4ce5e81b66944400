"""What all algorithms share: checks at the door, orthonormal bases, deflation, systems side by side."""
