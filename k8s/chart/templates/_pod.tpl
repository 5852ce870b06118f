{{/* One pod template for all components: what differs between them are its arguments. */}}

{{/*
Takes root, component, key: of the values, args, config: content of the JSON file at
/etc/kleash/CONFIGFILE, configFile, grace: seconds, and may take ports: a map of numbers by name,
readiness: the gRPC service that says so, restartPolicy.
*/}}
{{- define "kleash.podTemplate" -}}
{{- $values := index .root.Values .key -}}
{{- $models := (include "kleash.podModels" . | fromJson).items -}}
{{- $volumes := include "kleash.volumes" (merge (dict "models" $models) .) | fromJson -}}
metadata:
  labels:
    {{- $own := include "kleash.podLabels" . | fromYaml }}
    {{- if include "kleash.needsSameNode" . }}{{ $_ := set $own "kleash.dev/claim" (include "kleash.claimLabel" .root) }}{{ end }}
    {{- toYaml (merge $own $values.podLabels .root.Values.podLabels .root.Values.commonLabels) | nindent 4 }}
  annotations:
    {{- $notes := dict "checksum/config" (sha256sum .config) "kubectl.kubernetes.io/default-container" .component }}
    {{- toYaml (merge $notes $values.podAnnotations .root.Values.podAnnotations) | nindent 4 }}
spec:
  serviceAccountName: {{ include "kleash.serviceAccount" . }}
  automountServiceAccountToken: {{ eq (include "kleash.callsApi" .) "true" }}
  enableServiceLinks: false
  {{- with include "kleash.pullSecrets" .root }}
  imagePullSecrets:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with .restartPolicy }}
  restartPolicy: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ .grace }}
  securityContext:
    {{- toYaml .root.Values.podSecurityContext | nindent 4 }}
  {{- include "kleash.scheduling" . | nindent 2 }}
  {{- with $values.resourceClaims }}
  resourceClaims:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $models }}
  initContainers:
    {{- range . }}
    {{- include "kleash.fetchContainer" (merge (dict "fetch" .) $) | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ .component }}
      image: {{ include "kleash.image" .root }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      args:
        {{- toYaml (concat .args (default list $values.extraArgs)) | nindent 8 }}
      {{- with include "kleash.env" (merge (dict "own" (dict "HF_HUB_OFFLINE" (ternary "0" "1" (eq (include "kleash.downloadsData" .) "true")))) .) }}
      env:
        {{- . | nindent 8 }}
      {{- end }}
      {{- with $values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .ports }}
      ports:
        {{- range $name, $port := . }}
        - name: {{ $name }}
          containerPort: {{ $port }}
          protocol: TCP
        {{- end }}
      {{- end }}
      {{- with .readiness }}
      {{- include "kleash.probes" (dict "root" $.root "service" .) | nindent 6 }}
      {{- end }}
      {{- with $values.lifecycle }}
      lifecycle:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- include "kleash.resources" $values | nindent 8 }}
      securityContext:
        {{- toYaml .root.Values.containerSecurityContext | nindent 8 }}
      volumeMounts:
        {{- toYaml $volumes.mounts | nindent 8 }}
  volumes:
    {{- toYaml $volumes.volumes | nindent 4 }}
{{- end -}}

{{/* Brings one model, or waits for the folder that holds it. Takes what the pod template takes, and fetch. */}}
{{- define "kleash.fetchContainer" -}}
{{- $model := .fetch.model -}}
{{- $values := index .root.Values .key -}}
{{- $args := list "fetch" (ternary $model.uri $model.folder $model.isRemote) -}}
{{- if $model.isRemote }}{{ $args = append $args (printf "--out=%s" $model.folder) }}{{ end -}}
{{- if $model.hasLineage }}{{ $args = append $args "--needs_lineage" }}{{ end -}}
{{- with .fetch.sha256 }}{{ $args = append $args (printf "--sha256=%s" .) }}{{ end -}}
{{- $args = append $args (printf "--wait_s=%v" .fetch.waitSeconds) -}}
- name: fetch-{{ .fetch.label }}
  image: {{ include "kleash.image" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  args:
    {{- toYaml $args | nindent 4 }}
  {{- with include "kleash.env" (merge (dict "own" (dict "HF_HUB_OFFLINE" (ternary "0" "1" $model.isRemote)) "isInit" true) .) }}
  env:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with .fetch.secret }}
  envFrom:
    - secretRef:
        name: {{ . }}
  {{- end }}
  resources:
    {{- toYaml .root.Values.fetch.resources | nindent 4 }}
  securityContext:
    {{- toYaml .root.Values.containerSecurityContext | nindent 4 }}
  volumeMounts:
    {{- $volumes := include "kleash.volumes" (merge (dict "models" (list .fetch) "isInit" true) .) | fromJson }}
    {{- toYaml $volumes.mounts | nindent 4 }}
{{- end -}}

{{/*
Environment as a list in which no name is there twice: the chart's own, then `extraEnv` of all pods,
then that of the component. Takes root, component, key, own: a map, and may take isInit.
*/}}
{{- define "kleash.env" -}}
{{- $env := deepCopy .own -}}
{{- if not .isInit -}}
{{- $env = merge (include "kleash.clientEnv" . | fromJson) $env -}}
{{- range $name, $field := dict "POD_NAME" "metadata.name" "POD_NAMESPACE" "metadata.namespace" "POD_UID" "metadata.uid" -}}
{{- $_ := set $env $name (dict "valueFrom" (dict "fieldRef" (dict "fieldPath" $field))) -}}
{{- end -}}
{{- end -}}
{{- range $extra := list .root.Values.extraEnv (index .root.Values .key).extraEnv -}}
{{- range $name, $value := $extra }}{{ $_ := set $env $name $value }}{{ end -}}
{{- end -}}
{{- $list := list -}}
{{- range $name, $value := $env -}}
{{- $entry := ternary $value (dict "value" (toString $value)) (kindIs "map" $value) -}}
{{- $list = append $list (merge (dict "name" $name) $entry) -}}
{{- end -}}
{{- toYaml $list -}}
{{- end -}}

{{/* Requests and limits, with the accelerators. Takes the values of a component. */}}
{{- define "kleash.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if gt (int (.gpu).count) 0 -}}
{{- $limits := set (default dict $resources.limits) .gpu.resourceName (int .gpu.count) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- if and .resourceClaims (not $resources.claims) -}}
{{- $claims := list -}}
{{- range .resourceClaims }}{{ $claims = append $claims (dict "name" .name) }}{{ end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/*
startup and liveness ask whether the process is alive, which it is while it loads; readiness asks
the service itself. All on the plain port, which TLS and authentication do not touch.
Takes root, service.
*/}}
{{- define "kleash.probes" -}}
{{- $probes := dict -}}
{{- range $kind, $timing := .root.Values.probes -}}
{{- $service := ternary (trimPrefix "*" $.service) "liveness" (eq $kind "readiness") -}}
{{- $probe := merge (dict "grpc" (dict "port" 8081 "service" $service)) $timing -}}
{{- $_ := set $probes (printf "%sProbe" $kind) $probe -}}
{{- end -}}
{{- toYaml $probes -}}
{{- end -}}

{{- define "kleash.pullSecrets" -}}
{{- $names := list -}}
{{- range concat .Values.imagePullSecrets (((.Values.global).imagePullSecrets) | default list) -}}
{{- $names = append $names (ternary . (dict "name" .) (kindIs "map" .)) -}}
{{- end -}}
{{- with $names }}{{ toYaml (uniq .) }}{{ end -}}
{{- end -}}
