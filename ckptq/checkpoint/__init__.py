"""The two doors to disk: open and read a checkpoint (headers before bytes), write a new one."""
