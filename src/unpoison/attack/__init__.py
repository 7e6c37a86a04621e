"""Red team: what would an attacker plant? Each paper is one module; every attack leaves a plan, the answer key."""
