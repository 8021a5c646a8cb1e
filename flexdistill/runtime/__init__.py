"""What ships inside every checkpoint; needs torch and transformers only."""

# first of all, so that registration with transformers never meets a half-imported module of this folder
import transformers  # noqa: F401
