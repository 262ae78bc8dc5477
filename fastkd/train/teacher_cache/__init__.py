"""The teacher's output, computed once: written in shards, and read in place of running the teacher."""
