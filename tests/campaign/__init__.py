"""The verification campaign: `nshandoff verify`."""
