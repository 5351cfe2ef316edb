"""Where it sits: the tokens on which two teachers differ, and how far a student moves along its teacher's direction."""
