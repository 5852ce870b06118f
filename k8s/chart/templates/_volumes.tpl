{{/* Volumes of a pod and where they are mounted. */}}

{{/*
{"volumes": [...], "mounts": [...]} as JSON. Takes root, component, key, models: see kleash.podModels,
configFile, and may take isInit: for an init container, which needs its model and no more.
*/}}
{{- define "kleash.volumes" -}}
{{- $values := index .root.Values .key -}}
{{- $isReader := has .component (list "policy" "reward" "reference" "packed") -}}
{{- $volumes := list -}}
{{- $mounts := list -}}
{{- $volumes = append $volumes (dict "name" "tmp" "emptyDir" (dict "sizeLimit" .root.Values.tmpSize)) -}}
{{- $mounts = append $mounts (dict "name" "tmp" "mountPath" "/tmp") -}}
{{- $volumes = append $volumes (dict "name" "cache" "emptyDir" (dict "sizeLimit" (default .root.Values.tmpSize $values.cacheSize))) -}}
{{- $mounts = append $mounts (dict "name" "cache" "mountPath" "/cache") -}}
{{- if .isInit -}}
{{- if (index .models 0).model.usesRuns -}}
{{- $mounts = append $mounts (dict "name" "runs" "mountPath" "/runs" "readOnly" true) -}}
{{- end -}}
{{- else -}}
{{- if .configFile -}}
{{- $volumes = append $volumes (dict "name" "config" "configMap" (dict "name" (include "kleash.name" .))) -}}
{{- $mounts = append $mounts (dict "name" "config" "mountPath" "/etc/kleash" "readOnly" true) -}}
{{- end -}}
{{- if include "kleash.usesRuns" . -}}
{{- $volumes = append $volumes (dict "name" "runs" "persistentVolumeClaim" (dict "claimName" (include "kleash.runsClaim" .root))) -}}
{{- $mount := dict "name" "runs" "mountPath" "/runs" -}}
{{- if $isReader }}{{ $_ := set $mount "readOnly" true }}{{ end -}}
{{- $mounts = append $mounts $mount -}}
{{- end -}}
{{- with $values.shmSize -}}
{{- $volumes = append $volumes (dict "name" "shm" "emptyDir" (dict "medium" "Memory" "sizeLimit" .)) -}}
{{- $mounts = append $mounts (dict "name" "shm" "mountPath" "/dev/shm") -}}
{{- end -}}
{{- end -}}
{{- $models := include "kleash.modelVolumes" (merge (dict "values" $values) .) | fromJson -}}
{{- $volumes = concat $volumes $models.volumes -}}
{{- $mounts = concat $mounts $models.mounts -}}
{{- if not .isInit -}}
{{- $auth := include "kleash.authVolumes" . | fromJson -}}
{{- $volumes = concat $volumes $auth.volumes (default list $values.extraVolumes) -}}
{{- $mounts = concat $mounts $auth.mounts (default list $values.extraVolumeMounts) -}}
{{- end -}}
{{- toJson (dict "volumes" $volumes "mounts" $mounts) -}}
{{- end -}}

{{/* What is downloaded, and claims and images that hold models. Takes root, models, values, isInit. */}}
{{- define "kleash.modelVolumes" -}}
{{- $volumes := list -}}
{{- $mounts := list -}}
{{- $names := list -}}
{{- range .models -}}
{{- $model := .model -}}
{{- if $model.isRemote -}}
{{- if not (has "models" $names) -}}
{{- $names = append $names "models" -}}
{{- $volumes = append $volumes (include "kleash.modelCache" $.values.modelCache | fromJson) -}}
{{- $mount := dict "name" "models" "mountPath" "/models" -}}
{{- if not $.isInit }}{{ $_ := set $mount "readOnly" true }}{{ end -}}
{{- $mounts = append $mounts $mount -}}
{{- end -}}
{{- else if $model.image -}}
{{- $name := printf "model-%s" (sha256sum $model.image | trunc 8) -}}
{{- $volumes = append $volumes (dict "name" $name "image" (dict "reference" $model.image "pullPolicy" "IfNotPresent")) -}}
{{- $mounts = append $mounts (dict "name" $name "mountPath" $model.folder "readOnly" true) -}}
{{- else if $model.claim -}}
{{- $name := printf "claim-%s" (sha256sum $model.claim | trunc 8) -}}
{{- if not (has $name $names) -}}
{{- $names = append $names $name -}}
{{- $volumes = append $volumes (dict "name" $name "persistentVolumeClaim" (dict "claimName" $model.claim "readOnly" true)) -}}
{{- $mounts = append $mounts (dict "name" $name "mountPath" (printf "/claims/%s" $model.claim) "readOnly" true) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "volumes" $volumes "mounts" $mounts) -}}
{{- end -}}

{{/* The volume that downloads go to. Takes modelCache. */}}
{{- define "kleash.modelCache" -}}
{{- if .existingClaim -}}
{{- toJson (dict "name" "models" "persistentVolumeClaim" (dict "claimName" .existingClaim)) -}}
{{- else if .storageClass -}}
{{- $spec := dict "accessModes" (list "ReadWriteOnce") "storageClassName" .storageClass "resources" (dict "requests" (dict "storage" .size)) -}}
{{- toJson (dict "name" "models" "ephemeral" (dict "volumeClaimTemplate" (dict "spec" $spec))) -}}
{{- else -}}
{{- toJson (dict "name" "models" "emptyDir" (dict "sizeLimit" .size)) -}}
{{- end -}}
{{- end -}}
