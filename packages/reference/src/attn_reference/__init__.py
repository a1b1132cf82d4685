"""The truth about attention: vocabulary, forward, LSE and gradients. Imports torch alone."""
