"""Plug-ins for other trainers, a file per package, which imports that package; nothing of tangora imports this one."""
