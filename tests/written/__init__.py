"""Small models as people write them, one file per school, each with what recognition must say of it."""
