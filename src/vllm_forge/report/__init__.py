"""What is known, told: plans, needs, the fitness of a host. Reads all rooms, changes none."""
