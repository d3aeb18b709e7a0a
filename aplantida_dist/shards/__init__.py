"""Behind the commands in shards/: building a dataset from pictures, and verifying one."""
