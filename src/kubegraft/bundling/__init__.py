"""Everything that a site without internet needs, in one directory: written here, verified and loaded there.

index     what is in a bundle, with sizes and digests; verifying it
commands  running pip and container tools
wheels    Python packages, pinned and hashed as for the images
weights   ImageNet weights as Keras publishes them
images    container images, as archives
create    all of it into one directory
load      images into a registry or kind cluster, weights into a folder or bucket

Whatever is not there already is fetched and verified aside; an interrupted call is continued by the same call.
"""
