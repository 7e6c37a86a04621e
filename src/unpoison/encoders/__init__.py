"""Images to features: a network, its preprocessing, and the safe ways to get one."""
