"""The networks: encoder, teacher, student, and their losses."""
