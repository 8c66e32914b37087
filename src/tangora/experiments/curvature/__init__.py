"""`tangora curvature`: what is measured, of whom, and with what."""
