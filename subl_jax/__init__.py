"""subl_jax: which behaviours come along when a student is distilled from a teacher agent on clean data?"""
